"""Names of files made from prompts: short enough for every file system, no two alike, and the map back."""

NAME_BYTES = 255 - 10  # what Linux and others take, less the prefix of `artifacts.written`
