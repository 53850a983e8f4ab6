"""Where bytes come from: HTTP connections, ranges, redirects and retries. Knows no kind of source; caches nothing."""
