"""What a reader's hands do on the studio's pages, by roles and names, however the pages are laid out."""

from playwright.sync_api import Locator, Page


def slider_of(page: Page, feature: str) -> Locator:
    """The slider of a feature on Live."""
    return page.get_by_role("slider", name=f"Amount for {feature}")


def notes_on(page: Page, feature: str) -> Locator:
    """The form for notes on a feature, unfolded where it is folded away."""
    editor = page.get_by_role("region", name=f"Notes on {feature}", exact=True)
    if not editor.locator(".text").is_visible():
        editor.locator("summary").first.click()
    return editor


def goes_sideways(page: Page) -> bool:
    """Whether the page is wider than the screen."""
    return bool(page.evaluate("document.documentElement.scrollWidth > innerWidth"))
