"""Model families and the layers that they share. Experts are seen only through a protocol that the engine injects."""
