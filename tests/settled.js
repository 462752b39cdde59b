// Runs in every page before its own scripts: since when the page is drawn and nothing moves, and what is too wide.
(() => {
  const busy = '[data-testid="stStatusWidget"], [data-testid="stSkeleton"], [data-testid="stSpinner"], [data-stale="true"]';
  let since = null;

  const drawn = () => {
    const app = document.querySelector('[data-testid="stApp"]');
    return app !== null
      && app.dataset.testConnectionState === "CONNECTED"
      && app.dataset.testScriptState === "notRunning"
      && document.querySelector('[data-testid="stMain"] [data-testid="stVerticalBlock"] > *') !== null
      && document.querySelector(busy) === null
      && [...document.querySelectorAll('[data-testid="stVegaLiteChart"]')].every(painted);
  };

  const painted = (chart) => {
    const mark = chart.querySelector("canvas, svg .mark-group");
    return mark !== null && chart.getBoundingClientRect().height > 0;
  };

  // What is painted within a frame is there when the next one begins.
  const look = () => {
    since = drawn() ? since ?? performance.now() : null;
    requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
  document.addEventListener("DOMContentLoaded", () => {
    const watched = { subtree: true, childList: true, attributes: true, characterData: true };
    new MutationObserver(() => { since = null; }).observe(document.body, watched);
  });
  window.settledSince = (quiet) => since !== null && since + quiet <= performance.now() ? since : false;

  const main = () => document.querySelector('[data-testid="stMain"]');

  window.wholeHeight = () => {
    const scrolled = main();
    return scrolled.scrollHeight + innerHeight - scrolled.clientHeight;
  };

  window.tooWide = () => {
    const page = document.documentElement;
    if (page.scrollWidth <= innerWidth && main().scrollWidth <= main().clientWidth) return [];
    return [...main().querySelectorAll("*")]
      .filter((element) => element.getBoundingClientRect().right > innerWidth + 1)
      .map((element) => `${element.tagName} ${element.dataset.testid ?? ""} ${element.getBoundingClientRect().right}`)
      .slice(0, 10);
  };
})();
