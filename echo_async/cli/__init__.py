"""The commands: everything that parses options, prints or handles signals."""
