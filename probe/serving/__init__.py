"""Serving: a page and an endpoint that classify single images, many clients in one step of the device."""
