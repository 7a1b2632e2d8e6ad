"""Imported first by the server that ranks are forked from, so that it ends when the tests end."""

from turnout.launch.ranks.parent import die_with_parent

die_with_parent()
