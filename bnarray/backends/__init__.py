"""One file per array library; the file's name is its registration. `generic` serves the others."""
