"""What each kernel can do, as data, and the choice that is made from it."""
