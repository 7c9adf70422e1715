"""How one expert is stored and computed: a file per format, and the arithmetic on packed slots."""
