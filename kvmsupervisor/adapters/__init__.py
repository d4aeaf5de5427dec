"""Everything that touches the world, one external system a module. Adapters never import each other."""
