"""The built-in plugins; they register exactly as a third party's do."""
