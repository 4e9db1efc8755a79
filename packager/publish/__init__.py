"""A verified bundle on its way out: hub transaction, plain directory, and a loopback hub to rehearse on."""
