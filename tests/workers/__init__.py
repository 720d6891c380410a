"""Several processes that train one network: real ones, ended in every way."""
