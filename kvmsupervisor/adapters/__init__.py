"""Everything that touches the outside world, one external system a module. Adapters never import each other."""
