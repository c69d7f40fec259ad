"""The command line: parses, calls the public API, prints. One module for each group of commands."""
