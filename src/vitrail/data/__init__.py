"""From files to batches: `decode` reads pictures, `sets` finds them, `loader` makes batches, `augment` changes them."""
