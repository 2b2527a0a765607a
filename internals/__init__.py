"""Supporting modules: reading and checking data, errors, preemption, precision, memory."""
