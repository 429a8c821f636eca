"""What the benchmarks of serving and of export share: checkpoints, servers, clients, figures."""
