"""Touch the private parts of Flower and Ray, each with the reason; nothing outside does.

messages     flower_messages: who sent what, and what a message is made of
rules        flower_strategies: what a server optimiser holds between rounds
simulation   flower_simulation: workers, messages and addresses of Flower's engine and of Ray
deployment   flower_fleet: a SuperLink's nodes and what it pulls from them
device       flower_supernode: a SuperNode, and its messages for a worker that stays

Written for flwr 1.41 and 1.42, which `constraints.txt` pins; the tests of each caller fail where a
later version has moved a part.
"""
