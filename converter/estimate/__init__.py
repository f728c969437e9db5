"""How much memory and time a conversion takes, from shapes alone."""
