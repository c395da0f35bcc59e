"""The vault: expert and dense weights in host memory, one copy a host, and how other hosts read it.

memory   the memory file, its index, who maps it     keeper      the process that fills it and looks after it
room     what it takes, and what the host has        shares      which hosts hold which experts
stall    the process that gives it to other hosts    remote      reading other hosts' vaults and slots
transport  the interface to them, and TCP            mooncake    RDMA, or TCP, by Mooncake's Transfer Engine
transports  which of these a process uses            fabric      which of these this host could use
"""
