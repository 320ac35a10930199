"""From files to batches: `decode` reads images, `sets` finds them, `loader` makes batches, `augment` changes them."""
