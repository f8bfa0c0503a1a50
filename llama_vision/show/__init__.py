"""What a run kept of its pictures, to look at: as a PNG, or as a page that needs no network."""
