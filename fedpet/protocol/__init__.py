"""Every byte that travels: plan, request, frame, registration; and the ledger of them."""
