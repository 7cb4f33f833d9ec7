"""The sparse decoder-only trunk: latent attention, shortcut experts and n-gram embedding."""
