"""One page over one or several results: `optimum-cli regcache report`."""
