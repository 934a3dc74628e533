"""The fused linear head: losses applied without logits."""
