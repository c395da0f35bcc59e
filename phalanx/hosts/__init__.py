"""Several hosts, one service: how launchers find each other, and how their processes talk through them.

    places    which ranks a host has, who may take a host's place, and how long a host may be silent. Pure
    talk      what launchers say to each other, and the connection on which they do
    gate      where other hosts knock: a listener that admits only those who know the cluster's token
    tunnel    carries connections from a socket here to a socket on another host
    muster    the first host's hand on all others

Every connection between hosts begins at a gate. Processes other than launchers know nothing of this: they connect to
sockets of their own host, and a tunnel brings what they say to where it belongs. No torch here.
"""
