"""Run a round on the server, in this order:

sample       client_pool, tier_assignment
request      requests, downlink, client_records
collect      pending_messages, reply_stream, replies
aggregate    aggregation
all of it    rounds; node_registry stands before it in a deployment
"""
