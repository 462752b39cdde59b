// Keeps account, frame by frame, of what a reader of a live page would be disturbed by.
(() => {
  const main = document.querySelector('[data-testid="stMain"]');
  const count = (selector) => main.querySelectorAll(selector).length;
  const painted = () =>
    [...main.querySelectorAll('[data-testid="stVegaLiteChart"]')].filter((chart) => chart.querySelector("canvas, svg .mark-group")).length;
  const faintest = () =>
    Math.min(1, ...[...main.querySelectorAll('[data-stale="true"]')].map((element) => Number(getComputedStyle(element).opacity)));
  const kept = { frames: 0, rounds: [], top: [], charts: [], painted: [], metrics: [], faintest: 1, skeletons: 0, heights: [] };

  const enter = (list, value) => {
    if (list.at(-1) !== value) list.push(value);
  };

  const look = () => {
    const rounds = [...main.querySelectorAll('[data-testid="stMetric"]')].find((metric) => metric.innerText.startsWith("Rounds done"));
    kept.frames += 1;
    enter(kept.rounds, rounds ? Number(rounds.innerText.match(/(\d+) of/)?.[1]) : null);
    enter(kept.top, main.scrollTop);
    enter(kept.charts, count('[data-testid="stVegaLiteChart"]'));
    enter(kept.painted, painted());
    enter(kept.metrics, count('[data-testid="stMetric"]'));
    enter(kept.heights, main.scrollHeight);
    kept.faintest = Math.min(kept.faintest, faintest());
    kept.skeletons = Math.max(kept.skeletons, count('[data-testid="stSkeleton"], [data-testid="stSpinner"]'));
    requestAnimationFrame(look);
  };
  window.watched = kept;
  look();
})();
