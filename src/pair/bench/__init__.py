"""The benchmark: every table and figure of the paper, as data, measured by one command each."""
