"""Models: `registry` builds them by name, `contract` says what every one of them returns."""
