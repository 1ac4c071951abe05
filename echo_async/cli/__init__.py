"""The commands: everything that uses click, prints, or handles signals."""
