"""What the server that ranks are forked from imports first: it goes with the tests, and the ranks with it."""

from turnout.launch.ranks.parent import die_with_parent

die_with_parent()
