"""One module a verb, of its name: `run(arguments)` does it and returns its JSON object."""
