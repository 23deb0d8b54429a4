"""A service over one bundle that holds a latency goal by going from one network to another as load changes."""
