"""The commands' options and bodies."""
