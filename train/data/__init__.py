"""Data: where samples come from (`sources`) and which of them an optimizer step consumes (`order`)."""
