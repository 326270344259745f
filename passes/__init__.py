"""Graph passes, one a file; tilewright.passes.pipeline holds their order."""
