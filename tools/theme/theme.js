// Runs before the first paint: the theme that the reader chose, or the system's.
(() => {
  const root = document.documentElement
  const stored = () => { try { return localStorage.getItem('theme') } catch { return null } }
  const system = matchMedia('(prefers-color-scheme: dark)')
  const apply = () => { root.dataset.theme = stored() || (system.matches ? 'dark' : 'light') }
  system.addEventListener('change', apply)
  root.classList.add('js')
  apply()
})()
