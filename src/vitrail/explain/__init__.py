"""How a model comes to its answer for an image: numbers first, figures from them.

`trace` runs the encoder, and `attention`, `relevance`, `tokens`, `lens`, `positions`, `filters` and `faithful` compute
numbers from it. `explanation` gathers all that a page shows. `figures`, `overlay` and `page` draw them, and `command`
writes the files.
"""
