"""What pytest finds here are the examples in pages; scripts are run by the site's build."""

collect_ignore_glob = ["*.py", "_sphinx/*", "examples/*", "gallery/*"]
