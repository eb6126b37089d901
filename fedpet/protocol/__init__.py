"""Write, read and count every byte that travels: plan, request, frame, registration, ledger."""
