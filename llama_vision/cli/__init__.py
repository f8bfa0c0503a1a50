"""The command line: arguments, streaming, reports."""
