"""The ways in which people write records for post-training down: one a file, found by place and name."""

import sys

from conf.registry import discover

discover(sys.modules[__name__])
