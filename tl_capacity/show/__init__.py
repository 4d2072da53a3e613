"""How a result looks in a terminal, a notebook and a figure."""
