#!/usr/bin/python3
"""Starts Patroni as the command patroni does, but that it keeps the address of a name for 5 s, and not for ten minutes.

A server that is started anew has another address. With the old one the primary's Patroni could not ask it whether it may
take over, and refused each switchover; nor could it go on without etcd, for which all members must answer.
"""

import sys

from patroni.__main__ import main
from patroni.dcs.etcd import DnsCachingResolver

# Patroni starts PostgreSQL from a process of its own, which reads this file too.
if __name__ == "__main__":
    DnsCachingResolver.__init__.__defaults__ = (5.0, 5.0)
    sys.exit(main())
