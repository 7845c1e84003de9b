"""What a step costs: throughput, FLOPs, memory."""
