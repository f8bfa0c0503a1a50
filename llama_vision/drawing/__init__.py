"""Pictures with what was kept of them, and the HTML that a notebook shows."""
