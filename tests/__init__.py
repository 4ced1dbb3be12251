import gc

# Exports make so many small objects that looking for garbage takes a fifth of their time; imports, too.
gc.set_threshold(50_000, 20, 100)
