"""Is it how one family of models departs from the plain Llama? One file for each, from metadata to `Architecture`."""
