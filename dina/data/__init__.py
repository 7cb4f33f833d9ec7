"""Raw data: sources, the embedded default data set of digits, and how it is read."""
