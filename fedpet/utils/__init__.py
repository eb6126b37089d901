"""Write files atomically, derive seeds, format numbers, lock folders."""
