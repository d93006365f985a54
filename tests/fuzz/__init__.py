"""Random calls of every public function, each judged: ``python -m tests.fuzz --minutes 10``."""
